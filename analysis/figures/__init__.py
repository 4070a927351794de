"""frame → Figure: static figures for print and screen, and the frame behind each."""
