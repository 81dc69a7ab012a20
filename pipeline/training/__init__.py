"""Stage two: a student is trained on the crops and labels of a store."""
