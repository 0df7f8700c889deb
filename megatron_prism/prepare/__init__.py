"""From files of text to a prepared mixture: sources, records, filters, tokens, packing, shards."""
