"""Who answers or judges: one door, several engines behind it."""
