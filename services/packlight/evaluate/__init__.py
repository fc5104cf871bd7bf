"""What packing costs, measured: tasks, the measures taken on them, results and the reports made of them."""
