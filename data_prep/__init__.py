"""Makes the files that fastgen trains from, and checks them: .beton files and manifests."""
