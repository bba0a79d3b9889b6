"""The audit: finds bins that do not hold what their inventory record says."""
