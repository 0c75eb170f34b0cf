"""What watches a run without changing it: health, evaluation, reports."""
