"""Per-layer micro-benchmarks: our kernels, the peak of this core, the rivals side by side."""
