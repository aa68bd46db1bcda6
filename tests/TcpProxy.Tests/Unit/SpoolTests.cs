using System;
using System.IO;
using System.Threading;
using System.Threading.Tasks;
using Xunit;

namespace TcpProxy.Tests;

/// <summary>What --record and --pcap write with; RecordTests and CaptureTests see what comes of it.</summary>
public sealed class SpoolTests
{
    [Fact(Timeout = 30_000)]
    public async Task A_disk_that_halts_at_the_very_end_holds_up_the_end_for_some_seconds_only()
    {
        using ManualResetEventSlim disk = new();
        Spool spool = new("test");
        spool.Open();
        SpoolFile file = new(
            () =>
            {
                disk.Wait(TestContext.Current.CancellationToken);
                throw new IOException("gone");
            },
            _ => { });
        lock (spool.Gate)
        {
            spool.Add(file, 1);
        }

        try
        {
            await Task.Run(spool.Close, TestContext.Current.CancellationToken)
                .WaitAsync(TimeSpan.FromSeconds(20), TestContext.Current.CancellationToken);
        }
        finally
        {
            disk.Set();
        }
    }
}
