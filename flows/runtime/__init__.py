"""Running stages: git, DVC, processes, logs, locks, tracking and Prefect."""
