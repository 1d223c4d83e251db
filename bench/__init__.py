"""Microbenchmarks of the kernels, installed as `polar_bench`: `polar bench`, or `make bench` in a checkout.

timing.py     one CUDA graph over rotating weights, median and spread; the memory's own rate
providers.py  what is measured: ours, cuBLAS, tinygemm
kernels.py    shapes x rows x providers, correctness first; the rows of the result
random_model.py, models.py, step_profile.py, model_report.py  whole models with random weights: `polar bench model`
report.py     the table, JSON and CSV, the charts, docs/benchmarks.md
results/      what the command wrote, with GPU, versions, commit and date
"""
