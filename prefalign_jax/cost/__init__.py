"""Operations, bytes and time of a step, counted before and during a run."""
