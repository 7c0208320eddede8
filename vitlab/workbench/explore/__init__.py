"""Widgets to look at models, plans and studies with; each is a plain figure where there are no widgets."""
