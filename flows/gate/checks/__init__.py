"""The gate's checks, by what they look at. Each says whether it is passed, what was found and what is allowed."""
