"""The decisions of the tier: leases, eviction, promotion, flush. Synchronous; stands on storage and core."""
