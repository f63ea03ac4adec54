"""Learning whether to split, in virtual time: the policy and the reward of production, and made-up tasks."""
