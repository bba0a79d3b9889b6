"""The audit: which bins hold something else than their inventory record says."""
