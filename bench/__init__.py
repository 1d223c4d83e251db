"""What `polar bench`, `polar bench model` and `polar ablate` run, installed as `polar_bench`.

timing.py     one CUDA graph over rotating weights, median and spread; the memory's own rate
providers.py  what is measured: ours, cuBLAS, tinygemm; peers.py: GemLite and Humming, where they are installed
kernels.py    shapes x rows x providers, correctness first; the rows of the result (measurement.py)
experts.py    the same for the experts of a mixture
random_model.py, models.py, step_profile.py, model_report.py  whole models with random weights: `polar bench model`
vllm_layers.py  the products of a decode step by the vLLM plug-in's layers: `polar bench vllm`
ablate.py, quality.py  what each part of the scheme gives, and docs/quality.md: `polar ablate`
report.py     the table, JSON and CSV, the charts, docs/benchmarks.md
results/      what the commands wrote, with GPU, versions, commit and date
"""
