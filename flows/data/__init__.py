"""From a source of examples to tokenised rows: reading, chat templates and labels, splits, and the report."""
