"""A run of the pipeline: the stages of dvc.yaml that changed, then the gate and the review page.

`run.py` does the work; `flow.py` is the same work as a Prefect flow.
"""
