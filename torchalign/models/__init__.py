"""Local features and their matchers: networks and their weights, batched, in fixed shapes."""
