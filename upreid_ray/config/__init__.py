"""Every setting: errors, sections, runs, downstream jobs, sweeps, presets."""
