"""From reviews to tables and figures."""
