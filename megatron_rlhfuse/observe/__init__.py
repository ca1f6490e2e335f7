"""What a run leaves and shows: metrics, trace, progress bar and report. Imports nothing heavy."""
