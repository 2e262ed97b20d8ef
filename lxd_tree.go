package transport

import (
	"context"
	"io/fs"
	"os"
)

// UploadTree is the [TreeUploader] of [UploadTree].
func (t *LXD) UploadTree(ctx context.Context, dst string, src fs.FS, opts *TreeOptions) (TreeStats, error) {
	return uploadTree(ctx, t, dst, src, opts, nil)
}

// DownloadTree is the [TreeDownloader] of [DownloadTree].
func (t *LXD) DownloadTree(ctx context.Context, src string, dst *os.Root, opts *TreeOptions) (TreeStats, error) {
	return downloadTree(ctx, t, src, dst, opts, nil)
}
