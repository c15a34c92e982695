"""Beyond one machine, on engines that exist: sweeps as mapped tasks, in threads, processes or on Ray."""
