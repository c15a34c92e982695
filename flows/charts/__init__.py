"""Charts that several reports show."""
