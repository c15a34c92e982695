"""Trials and sweeps: DVC experiments, and Prefect tasks in threads, in processes or on Ray."""
