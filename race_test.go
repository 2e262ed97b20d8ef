//go:build race

package transport_test

// underRace: everything takes several times as long, and what is the same many times over is done less often. scripts/test runs it without, too.
const underRace = true
