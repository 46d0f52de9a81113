"""Runs on clusters: who is started where, watched how, and what happens when something dies; without torch.

``supervisor`` runs once per job and decides by ``policy``; ``node`` runs once per node and starts, watches and ends the
ranks. They speak in lines of JSON over stdin and stdout, which srun carries, so no port is opened for it.
"""
