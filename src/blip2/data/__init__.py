"""Where pictures and texts come from: shards, tables, folders and the published layouts of captions."""
