"""The nouns that every other package speaks: records, examples, the ledger, artifacts, configs and errors."""
