"""Looking at stores: facts, statistics, reports, contact sheets, and labelling crops
again."""
