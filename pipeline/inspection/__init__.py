"""Look at stores: facts, statistics, reports, contact sheets, labels computed again."""
