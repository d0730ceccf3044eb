"""The pipeline: each module is a stage of dvc.yaml, run as `python -m stages.NAME`."""
