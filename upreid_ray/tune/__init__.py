"""Many runs on Ray Tune: sweeps over settings, judged by retrieval."""
