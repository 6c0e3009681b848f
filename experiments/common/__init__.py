"""What the runners share: settings, command line, run folder, progress, building."""
