"""What runs stages: git, processes, logs, locks, DVC and Prefect."""
