package sys

const (
	sysFstatat     = 262
	sysFinitModule = 313
)
