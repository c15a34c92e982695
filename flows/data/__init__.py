"""From a source of examples to tokenised rows: reading, chat templates and labels, splits, the report."""
