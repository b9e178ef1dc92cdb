"""What a store's files look like: names, digests, number formats, arrays, manifests."""
