"""Which projections to adapt: quality against cost, measured."""
