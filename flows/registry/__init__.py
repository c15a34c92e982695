"""The registry of adapter versions, kept in git tags and DVC."""
