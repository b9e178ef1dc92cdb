"""Looking after a store: damage, room, copies, access of others."""
