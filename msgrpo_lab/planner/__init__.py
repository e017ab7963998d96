"""What a run will cost, said before anything is run: work, memory and hours, each with what it assumes."""
