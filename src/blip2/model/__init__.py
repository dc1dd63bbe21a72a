"""Pure tensor mathematics: no files, no network, nothing of the package but `config` and `protocols`."""
