"""The backends that answer and judge, behind one interface."""
