using System;
using System.IO;
using System.Runtime.CompilerServices;
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

    [Fact]
    public void One_that_is_closed_is_garbage()
    {
        WeakReference spool = Closed();
        for (int i = 0; i < 10 && spool.IsAlive; i++)
        {
            GC.Collect();
            GC.WaitForPendingFinalizers();
        }

        Assert.False(spool.IsAlive, "something holds it, and its 4 MB");

        [MethodImpl(MethodImplOptions.NoInlining)] // its locals would live as long as the test
        static WeakReference Closed()
        {
            Spool spool = new("test");
            spool.Open();
            spool.Close();
            return new WeakReference(spool);
        }
    }
}
