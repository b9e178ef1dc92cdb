"""Where bytes are: a disk, a bucket, a read-only mirror, a cache of remote files."""
