"""One script per claim. Each prints what it measured, on which machine, and keeps it in results/."""
