"""A stand-in for Optimum for Intel Gaudi, where its entry point is called and what it patches."""
