"""int8: what is quantised, how, and what stays as it is."""
