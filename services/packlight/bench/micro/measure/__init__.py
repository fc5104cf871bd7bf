"""What the micro-benchmarks do. Each module is imported only by the benchmark that runs: most need torch."""
