"""From a name, path or Hub id to a backbone."""
