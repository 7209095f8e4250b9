package sys

const (
	sysFstatat     = 79
	sysFinitModule = 273
)
